"""Files on a disk or in an object store: their paths, and files that are whole or not there."""

from jaxdiff.files.paths import Path as Path
from jaxdiff.files.paths import guards as guards
from jaxdiff.files.paths import is_stored as is_stored
from jaxdiff.files.paths import names as names
from jaxdiff.files.paths import remove_tree as remove_tree
from jaxdiff.files.paths import sizes as sizes
from jaxdiff.files.paths import to_path as to_path
from jaxdiff.files.scratch import scratch as scratch
from jaxdiff.files.whole import flush as flush
from jaxdiff.files.whole import hold as hold
from jaxdiff.files.whole import is_leftover as is_leftover
from jaxdiff.files.whole import whole as whole
from jaxdiff.files.whole import write_arrays as write_arrays
from jaxdiff.files.whole import write_text as write_text
