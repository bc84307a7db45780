# Finds uv, or installs it into .uv, and lets it run set_up.py. The counterpart of set_up in `qit`;
# called by qit.cmd, for PowerShell 5.1 or newer. Not verified on Windows yet.

$uvVersion = '0.13.9'
$root = Split-Path -Parent $PSScriptRoot
$uvFolder = Join-Path $root '.uv'
$ownUv = Join-Path $uvFolder 'uv.exe'
$utf8 = New-Object System.Text.UTF8Encoding $false
[Console]::OutputEncoding = $utf8
$OutputEncoding = $utf8
$env:PYTHONUTF8 = '1'

function Say([string] $text) { [Console]::Error.WriteLine("qit: $text") }

function Test-Uv([string] $uv) {
    if (-not $uv -or -not (Get-Command $uv -CommandType Application -ErrorAction SilentlyContinue)) {
        return $false
    }
    $found = [regex]::Match("$(& $uv --version)", '^uv (\d+\.\d+)')
    return $found.Success -and ([version] $found.Groups[1].Value -ge [version] '0.13')
}

function Find-Uv {
    $places = $env:UV, 'uv', "$HOME\.local\bin\uv.exe", "$HOME\.cargo\bin\uv.exe", $ownUv
    return $places | Where-Object { Test-Uv $_ } | Select-Object -First 1
}

# In a folder of its own first: two first runs at once must not meet half an installation.
function Install-UvFromPyPI([string] $new) {
    foreach ($python in 'py', 'python') {
        if (-not (Get-Command $python -CommandType Application -ErrorAction SilentlyContinue)) { continue }
        & $python -m venv $new
        if ($LASTEXITCODE -ne 0) { continue }
        & "$new\Scripts\python.exe" -m pip install "uv==$uvVersion"
        if ($LASTEXITCODE -ne 0) { continue }
        Move-Item -Force "$new\Scripts\uv.exe" $ownUv
        return
    }
}

function Install-UvFromAstral([string] $new) {
    New-Item -ItemType Directory -Force $new | Out-Null
    # PowerShell 5.1 on an older Windows 10 offers TLS 1.0 first.
    [Net.ServicePointManager]::SecurityProtocol = [Net.SecurityProtocolType]::Tls12
    Invoke-WebRequest -UseBasicParsing "https://astral.sh/uv/$uvVersion/install.ps1" -OutFile "$new\install.ps1"
    $env:UV_INSTALL_DIR = $uvFolder
    $env:UV_NO_MODIFY_PATH = '1'
    & "$new\install.ps1"
}

$uv = Find-Uv
if (-not $uv) {
    Say "installing uv $uvVersion into $uvFolder"
    New-Item -ItemType Directory -Force $uvFolder | Out-Null
    $new = Join-Path $uvFolder "new.$PID"
    foreach ($way in 'Install-UvFromPyPI', 'Install-UvFromAstral') {
        try { & $way $new | Out-Host } catch { Say $_ }
        if (Test-Uv $ownUv) { break }
    }
    Remove-Item -Recurse -Force -ErrorAction SilentlyContinue $new
    $uv = Find-Uv
}
if (-not $uv) {
    Say ('could not install uv, neither from PyPI (which takes Python 3) nor from astral.sh: ' +
        'install it as https://docs.astral.sh/uv says, then run this again.')
    exit 1
}

if (-not $env:UV_PYTHON_PREFERENCE) { $env:UV_PYTHON_PREFERENCE = 'system' }
Set-Location $root
& $uv run --quiet --no-project --script scripts\set_up.py @args
if ($LASTEXITCODE -eq 2) {
    Say ('uv found no Python 3.11 to 3.14 and could not download one: ' +
        'install Python 3.11 or newer, then run this again.')
}
exit $LASTEXITCODE
