"""Reports: records and results as tables, sentences and comparisons. Nothing here touches a device,
TVM or PyTorch.
"""
