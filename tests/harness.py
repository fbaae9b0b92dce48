from parallel.local import RankFailed as RankFailed
from parallel.local import apart as apart
from parallel.local import run as run
