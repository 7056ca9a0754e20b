INSERT INTO bad VALUES ('machines/' || char(27) || '[2J' || char(10) || char(8238), '{}');
