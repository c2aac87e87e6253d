"""`python -m layercast.server` is the command `layercast`."""

import sys

from layercast.client.main import main

if __name__ == "__main__":
    sys.exit(main())
