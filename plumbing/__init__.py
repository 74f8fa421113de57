"""Infrastructure that any such kit needs. The method is in the chapters, which it never imports.

A module imports only those before it: cli, devices, text, files, formats, runfolder, transport,
remote, models, attention, scorer, generate, served, engines, web, ranks, rates, metrics, intervals,
signals, checkpoints, report, episodes, page."""
