"""TR-DQ Studio: the page over `trdq_core`. It builds the run that the command line takes, and shows the folder it leaves."""
