"""One file a family of suites: each says which cases there are and how their subjects are built."""
