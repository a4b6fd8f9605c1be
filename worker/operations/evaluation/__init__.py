"""`tandem eval`: what a file of conversations costs at a version, whether its answers are given, and how that changed.

cases        the file, as tokens                  live         asked of the running server, over HTTP
offline      of a version made again on the CPU   comparison   two versions, in pairs, with intervals
tables       the same as text and JSON            answers      kept answers, on disk alone
"""
