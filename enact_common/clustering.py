"""`enact_common.attention.clustering` and its clusters, under the name that scripts import."""

from enact_common.attention.clustering import *  # noqa: F403
from enact_common.attention.clusters import RaggedClusters, Windows, cut_windows  # noqa: F401
