"""The test suite. A package, so that every folder of tests can import `tests.support`."""
