"""The order of the stages, and the two ways to run them: in this process, or as services of the Compose stack.

In: a recipe and a build folder. Out: stage folders below the build folder; the state of each stage and why it is not up
to date. registry.py lists the stages, runner.py runs them here, compose.py in containers (logged_command.py runs one
command of Docker). Nothing here does a stage's work, and no stage imports this package.
"""
