"""Where the program starts. Until `main` is there to answer Ctrl-C, it ends the program without a word."""

import signal


def start() -> None:
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cli.main import main

    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
