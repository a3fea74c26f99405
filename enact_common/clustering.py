"""Alias of `enact_common.attention.clustering` and its clusters, for scripts that import this name."""

from enact_common.attention.clustering import *  # noqa: F403
from enact_common.attention.clusters import RaggedClusters, Windows, cut_windows  # noqa: F401
