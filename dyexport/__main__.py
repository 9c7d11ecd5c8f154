"""``python -m dyexport``."""

from dyexport.cli import main

main()
