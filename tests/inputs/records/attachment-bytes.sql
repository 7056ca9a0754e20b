INSERT INTO bad VALUES ('attachments/vni1002/10.0.0.0/24', X'00FF');
