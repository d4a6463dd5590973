"""The command line `tutor`: options, help texts, exit codes, progress, tables.

In: sys.argv, environment variables, stdin. Out: the result on stdout, as lines or with --json as one document; progress
and errors on stderr; the exit code.

    main       the top-level group, and the order of its commands
    commands   one module a subject: run, inspect, data, evaluate, serving, stack, doctor
    options    options that several commands have, reading the recipe, printing the result
    exit       exceptions -> one line on stderr, and an exit code
    progress   log records -> a live bar at a terminal, or plain lines
    summary    results -> tables for a terminal

Computes no figure and decides nothing about stages: each command calls one function of another package. Imports
standard library and click alone, until a command runs: `tutor --help` does not wait for torch.
"""
