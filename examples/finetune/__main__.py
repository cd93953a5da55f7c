"""``python -m examples.finetune``"""

import sys

if __name__ == "__main__":
    try:
        from .command import main  # here, because torch and transformers take seconds in which Ctrl-C may come

        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
