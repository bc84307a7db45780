@echo off
rem The server alone, without a window: the same as `qit serve`, and it takes the same options.
"%~dp0qit.cmd" serve %*
