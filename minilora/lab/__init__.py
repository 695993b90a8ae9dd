"""The lab: this package in a web page. Python computes and answers in JSON; the page draws and asks."""
