INSERT INTO bad VALUES ('attachments/vni1002/10.0.0.0/24', '{"segment":"vni1002","address":"10.0.0.0/24","subscription":"fabrikam","workload":"vm","started":null}');
