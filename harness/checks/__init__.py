"""One file per check; the registry is `harness.checks.CHECKS`."""
