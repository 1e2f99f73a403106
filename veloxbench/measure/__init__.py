"""How it is measured: the suites, their protocols and the account of what a cache holds. Only ``throughput`` reads
clocks. A change here changes the harness's hash, so that every record is measured anew.
"""
