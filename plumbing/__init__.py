"""The engine room: what any kit of this kind needs. It imports no chapter, and no reader of the method has to come here.

From the bottom up (a module imports only those before it): cli, text, files, remote, models, attention, scorer, generate,
served, engines, web, rates, checkpoints, report.
"""
