"""`python -m icf`: the command line."""
from icf.cli import main

if __name__ == "__main__":
    main()
