"""python -m spectral_callbacks.cli."""

from spectral_callbacks.cli.main import main

main()
