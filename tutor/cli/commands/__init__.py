"""The commands of `tutor`, one module a subject.

In: options and arguments, parsed by click. Out: what one function of another package returns, printed.

    run        run, one command a stage, data split, clean
    inspect    summary, status, why, report, verify
    data       data check, lint, stats
    evaluate   eval, compare
    serving    ask, chat, publish, promote, rollback, models
    stack      the Compose stack
    doctor     checks of this machine, and the estimate of a recipe

None imports main, and each imports what is slow inside its functions.
"""
