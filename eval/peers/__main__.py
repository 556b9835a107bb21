"""`python -m eval.peers`."""

from eval.peers.command import main

if __name__ == "__main__":
    raise SystemExit(main())
