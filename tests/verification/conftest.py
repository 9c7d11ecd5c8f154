"""The bundles that a whole build makes, which several tests read."""

from tests.pipeline.conftest import bundle as bundle
