"""The books of recorded completions: which are kept until when, and what they take. Scripts: each is one step.

Must not know: the worker, RQ.
Invariants: all records together stay below the bound; the sum of bytes is a shortcut that nobody has to believe: it is
counted again from the index where it cannot be right, and when the caller asks.
"""

# ARGV: record, its charge in bytes, time to live in ms, bound in bytes, name of a record without its key, key,
# "1": count again. KEYS: the record, the index (member "key:charge", score: when it expires), the sum of all charges.
# First goes what has expired, then, where the new record would pass the bound, what would expire first.
SAVE = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local charge, ttl, most = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if charge > most then return 2 end
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
if redis.pcall('ZRANGE', KEYS[2], 0, 0).err then redis.call('DEL', KEYS[2]) end
local known = redis.pcall('GET', KEYS[3])
local sum = type(known) == 'string' and tonumber(known)
if ARGV[7] == '1' or not sum or sum < 0 or sum > most or sum ~= math.floor(sum) then
  sum = 0
  for _, entry in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    sum = sum + tonumber(string.match(entry, ':(%d+)$') or '0')
  end
end
while true do
  local first = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
  if #first == 0 then sum = 0 break end
  if tonumber(first[2]) > now and sum + charge <= most then break end
  local key, size = string.match(first[1], '^(.*):(%d+)$')
  redis.call('ZREM', KEYS[2], first[1])
  if key then
    redis.call('DEL', ARGV[5] .. key)
    sum = sum - tonumber(size)
  end
end
redis.call('SET', KEYS[3], sum)
redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ttl)
redis.call('ZADD', KEYS[2], now + ttl, ARGV[6] .. ':' .. ARGV[2])
redis.call('SET', KEYS[3], sum + charge)
return 0
"""


# KEYS: as for SAVE. ARGV: what is charged beside the value, key.
REMOVE = """
local charge = redis.call('STRLEN', KEYS[1]) + tonumber(ARGV[1])
local gone = redis.call('DEL', KEYS[1])
if redis.call('ZREM', KEYS[2], ARGV[2] .. ':' .. string.format('%d', charge)) == 1 then
  redis.pcall('DECRBY', KEYS[3], charge)
end
return gone
"""
