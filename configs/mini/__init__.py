"""The paper in miniature: a made task, its base policy and the runs that docs/mini.md tables."""
