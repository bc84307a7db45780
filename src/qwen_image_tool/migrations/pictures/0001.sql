-- id: from the name of the file, so that it stays when the index is made again.
-- taken: when the picture was made, from its file's name, else its file's time.
-- number: `taken` as YYYYmmddHHMMSS and four more digits, so that its order is the order of time,
-- which the index of words can follow without sorting.
CREATE TABLE pictures (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    file TEXT NOT NULL UNIQUE,
    bytes INTEGER NOT NULL,
    changed INTEGER NOT NULL,
    taken TEXT NOT NULL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    model TEXT NOT NULL DEFAULT '',
    seed INTEGER,
    job TEXT NOT NULL DEFAULT '',
    prompt TEXT NOT NULL DEFAULT '',
    negative TEXT NOT NULL DEFAULT '',
    request TEXT,
    star INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX pictures_by_model ON pictures (model);
CREATE INDEX pictures_by_star ON pictures (star);
CREATE INDEX pictures_by_job ON pictures (job) WHERE job != '';
CREATE VIRTUAL TABLE words USING fts5 (
    prompt, negative, model, content = 'pictures', content_rowid = 'number',
    tokenize = 'trigram'
);
CREATE TRIGGER pictures_words_in AFTER INSERT ON pictures
BEGIN
    INSERT INTO words (rowid, prompt, negative, model)
    VALUES (new.number, new.prompt, new.negative, new.model);
END;
CREATE TRIGGER pictures_words_out AFTER DELETE ON pictures
BEGIN
    INSERT INTO words (words, rowid, prompt, negative, model)
    VALUES ('delete', old.number, old.prompt, old.negative, old.model);
END;
