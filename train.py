"""Train a main LLM and its eavesdropping head: `python train.py [experiment=NAME] [key=value ...]`.

`python train.py --help` lists the options; conf/ holds the defaults and the experiments. Where the
package is installed, `mtp train` is the same.
"""

import sys

from mtp.cli.train import main
from mtp.common.process import quiet_imports

if __name__ == "__main__":
    quiet_imports()
    sys.exit(main())
