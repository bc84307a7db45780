-- Stars of files that went without us, as a disk that is not plugged in: they come back with them.
CREATE TABLE waiting_stars (file TEXT PRIMARY KEY) WITHOUT ROWID;
