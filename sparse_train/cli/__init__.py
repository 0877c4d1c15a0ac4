"""The command line, ``sparse-train``: ``main`` lists the commands, and each has a file here."""
