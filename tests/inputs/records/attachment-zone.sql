INSERT INTO bad VALUES ('attachments/vni1002/fe80::1%eth0', '{"segment":"vni1002","address":"fe80::1%eth0","subscription":"11111111-0000-4000-8000-000000000002","workload":"vm","started":null}');
