"""Files that are read where they lie: on a local disk, in an S3 bucket, on a hub; a read fails late and says why."""

from .hub import NotThere as NotThere
from .hub import Offline as Offline
from .hub import hub_endpoint as hub_endpoint
from .hub import hub_host as hub_host
from .hub import hub_request as hub_request
from .hub import hub_url as hub_url
from .opened import Ranges as Ranges
from .opened import open_file as open_file
from .opened import open_ranges as open_ranges
from .patience import Patience as Patience
from .patience import Unreachable as Unreachable
from .s3 import RemoteFile as RemoteFile
from .s3 import list_files as list_files
