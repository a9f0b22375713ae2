"""`python -m trainer COMMAND`."""

import sys

if __name__ == "__main__":
    try:
        from trainer.cli import main
    except KeyboardInterrupt:  # while it was loading
        sys.exit(130)
    main()
