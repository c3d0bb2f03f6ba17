"""`python -m distlm`, the same as the `distlm` command."""

from distlm.main import main

if __name__ == "__main__":
    main()
