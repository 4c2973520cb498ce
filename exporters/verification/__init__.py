"""Whether two models compute the same: outputs compared within a budget, accuracy, the report and its record on disk.

It imports bundle, data and runtime. One more check is a stage in `report.Report`, made by the journey `verify`.
"""
