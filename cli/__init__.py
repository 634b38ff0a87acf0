"""Words into calls: one file per verb, parse, one library call, print."""
