@echo off
rem Runs QwenImageTool on Windows, as `qit` does elsewhere. Not verified on Windows yet.
rem The name of a script of PowerShell beside this one would win in PowerShell, where scripts are
rem forbidden until the user allows them: so scripts\set_up.ps1 is elsewhere, and only for set-up.
rem The program gets %* as it was typed: quotes and Chinese characters pass unchanged.
setlocal
set "PYTHONUTF8=1"
set "ROOT=%~dp0"
set "STAMP=ready"
set "OPTION="
for %%c in (setup check fix) do if "%~1"=="%%c" goto help

:begin
for %%c in (test check fix) do if "%~1"=="%%c" set "STAMP=ready-dev" & set "OPTION=--dev"
if "%~1"=="setup" set "OPTION=--again" & goto set_up
call :ready && goto start

:set_up
set "POWERSHELL=powershell"
where /q pwsh && set "POWERSHELL=pwsh"
%POWERSHELL% -NoProfile -ExecutionPolicy Bypass -File "%ROOT%scripts\set_up.ps1" %OPTION% || exit /b
if "%~1"=="setup" exit /b 0

:start
if "%STAMP%"=="ready-dev" goto dev
"%ROOT%.venv\Scripts\qit.exe" %*
exit /b

:dev
"%ROOT%.venv\Scripts\python.exe" "%ROOT%scripts\dev.py" %*
exit /b

rem Down here, because elsewhere the second argument may be a sentence, whose signs cmd would obey
:help
for %%h in (-h --help) do if "%~2"=="%%h" type "%ROOT%scripts\help.txt" & exit /b 0
goto begin

:ready
if not exist "%ROOT%.venv\Scripts\qit.exe" exit /b 1
for %%f in (uv.lock pyproject.toml scripts\set_up.py scripts\install_torch.py) do (
    fc /b "%ROOT%%%f" "%ROOT%.venv\%STAMP%\%%~nxf" >nul 2>nul || exit /b 1
)
if not defined QIT_TORCH_BACKEND exit /b 0
set "HAD="
set /p HAD=<"%ROOT%.venv\%STAMP%\torch-backend"
if not "%HAD%"=="%QIT_TORCH_BACKEND%" exit /b 1
exit /b 0
