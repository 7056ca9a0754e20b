"""Small tools without knowledge of the policy, for all other rooms.

Pure: `addresses`, addresses as people write them · `characters`, which characters are safe to store and to print ·
`codes`, the numbers of the reasons · `instance`, names and commands of an instance · `interfaces`, names of
interfaces · `limits`, the limits of all values · `netlink`, netlink messages as bytes · `words`, numbers in
sentences.

On the host: `clock`, the time that ends grants · `descriptors`, a reserve of file descriptors · `heartbeat`,
whether threads make progress · `locks`, who holds a lock · `mounts`, changes of mounts · `netns`, network
namespaces with a name · `ownership`, whose the policy table's files are · `resources`, the shipped files.
"""
