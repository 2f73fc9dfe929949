"""``python -m peft_study``: the command line, for launchers that start a module."""

from peft_study.cli import main

if __name__ == "__main__":
    main()
