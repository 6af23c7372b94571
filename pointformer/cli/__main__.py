import sys

from pointformer.cli import main

sys.exit(main())
