"""The pinned TypeScript compiler as a grader of code blocks.

In: fenced blocks of TypeScript, which may be hostile. Out: for each block an outcome (pass, type_error, syntax_error,
no_code, suppressed, timeout, grader_error) and the compiler's diagnostics.

compiler  runs the compiler under limits of time, memory and output, without network
scanner   finds suppressions, deep nesting and global declarations before anything is compiled
install   installs the compiler into the user's cache and finds it
src/      npm's package.json and lockfile

No block is executed. What the code should do is stated elsewhere (graders/code.py).
"""
