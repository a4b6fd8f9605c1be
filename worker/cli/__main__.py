"""`python -m worker.cli`: the same as `tandem`, where the console script is not on PATH."""

from worker.cli.main import main

if __name__ == "__main__":
    main()
