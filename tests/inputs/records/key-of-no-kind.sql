INSERT INTO bad VALUES ('machines/1', '{}');
