#!/usr/bin/env bash
# Run the commands of a file one after another: quality.py's arguments, one command a line, "#" comments.
#
#   PYTHON=.venv/bin/python benchmarks/queue.sh benchmarks/quality_queue.txt
#
# The file is read again before each command, and rows that are there are not run again: lines can be added while it
# runs, and after an interruption the same call goes on. A command that fails is reported, and the next one runs.
set -u
declare -A tried
while :; do
    next=
    while IFS= read -r line || [[ -n $line ]]; do
        line=${line%%#*}
        [[ -n ${line// /} && -z ${tried[$line]:-} ]] && next=$line && break
    done < "$1"
    [[ -z $next ]] && break
    tried[$next]=1
    echo "$(date -u +%T) quality.py $next"
    # shellcheck disable=SC2086  # the line is several arguments
    ${PYTHON:-python} benchmarks/quality.py $next || echo "failed ($?): $next"
done
