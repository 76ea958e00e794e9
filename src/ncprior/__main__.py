"""`python -m ncprior`, which is what `torchrun -m ncprior` starts in each process."""

from ncprior.cli import main

if __name__ == "__main__":
    main()
