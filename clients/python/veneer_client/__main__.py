"""`python -m veneer_client` is the `veneer` command."""

from veneer_client.cli import main

if __name__ == "__main__":
    main()
