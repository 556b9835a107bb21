"""`python -m eval.tables`."""

from eval.tables.readme import main

raise SystemExit(main())
