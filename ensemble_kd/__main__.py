"""`python -m ensemble_kd` is `ekd`."""

from ensemble_kd.cli import main

if __name__ == "__main__":
    main()
