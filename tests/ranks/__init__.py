"""Tests with several processes: what ``engines`` starts, on the engines that Lightning drives, over gloo on the CPU."""
