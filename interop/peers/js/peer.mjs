// A js-libp2p peer, driven by JSON lines: commands on standard input, answers on standard output.
//
//   node peer.mjs tcp|ws|quic noise|tls [serve|dial|RELAY|kad|autonat] [punch]   (QUIC's security is always TLS)
//
// The third word: be a relay, be able to dial through relays, hold a reservation at the relay of that address, be a
// server of Kademlia, or speak AutoNAT v2. The last: speak DCUtR. Who speaks one of these two listens on all addresses
// of the machine.
//
// First line out: {"peer": ID, "addresses": [...]}. Then for each {"id", "do", ...} one {"id", "result"} or
// {"id", "error"}: echo {address, bytes}, ping {address}, identify {address}, dial {address}, provide {multihash},
// providers {multihash}, find {peer}, addresses {}, verified {}. Ends with its standard input.
//
// The echo protocol: 8 bytes, big-endian, say how many bytes follow; the answer is those bytes. Each side
// may end its direction after its last byte; the listener ends only after it.

import { randomBytes } from 'node:crypto'
import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { quic } from '@chainsafe/libp2p-quic'
import { yamux } from '@chainsafe/libp2p-yamux'
import { autoNATv2 } from '@libp2p/autonat-v2'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { dcutr } from '@libp2p/dcutr'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { tls } from '@libp2p/tls'
import { webSockets } from '@libp2p/websockets'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { CID } from 'multiformats/cid'
import * as Digest from 'multiformats/hashes/digest'

const ECHO = '/raceme-interop/echo/1'
const PIECE_BYTES = 64 * 1024
const KAD = '/ipfs/kad/1.0.0'
const ANY_CONNECTION = { runOnLimitedConnection: true } // also through relays that limit what passes
const STEP_MS = 60_000 // no command takes longer
const QUERY_MS = 5_000 // one of Kademlia

const TRANSPORTS = {
  tcp: { listen: '/ip4/127.0.0.1/tcp/0', make: tcp },
  ws: { listen: '/ip4/127.0.0.1/tcp/0/ws', make: webSockets },
  quic: { listen: '/ip4/127.0.0.1/udp/0/quic-v1', make: quic }
}
const RAW = 0x55 // the kind of content that a CID names
const PRIVATE = /^\/ip4\/(127|192\.168)\./

const [transport, security, role, punching] = process.argv.slice(2)
const through = role?.startsWith('/') ? [`${role}/p2p-circuit`] : []
const relaying = ['serve', 'dial'].includes(role) || through.length > 0

async function send (stream, bytes) {
  if (!stream.send(bytes)) {
    await stream.onDrain({ signal: AbortSignal.timeout(STEP_MS) })
  }
}

async function answer (stream) {
  const head = Buffer.alloc(8)
  let seen = 0
  let left = null
  for await (const part of stream) {
    let data = Buffer.from(part.subarray())
    if (left === null) {
      const taken = data.copy(head, seen)
      seen += taken
      if (seen < 8) continue
      left = Number(head.readBigUInt64BE())
      data = data.subarray(taken)
    }
    if (data.length > 0) {
      left -= data.length
      await send(stream, data)
    }
    if (left <= 0) break
  }
  await stream.close()
}

async function echo (node, address, count) {
  const connection = await node.dial(multiaddr(address))
  const stream = await connection.newStream(ECHO, ANY_CONNECTION)
  const sent = randomBytes(count)
  const start = performance.now()
  const sending = (async () => {
    const head = Buffer.alloc(8)
    head.writeBigUInt64BE(BigInt(count))
    await send(stream, head)
    for (let at = 0; at < count; at += PIECE_BYTES) {
      await send(stream, sent.subarray(at, at + PIECE_BYTES))
    }
  })()
  const parts = []
  let received = 0
  for await (const part of stream) {
    parts.push(part.subarray())
    received += part.byteLength
    if (received >= count) break
  }
  await sending
  const seconds = (performance.now() - start) / 1000
  await stream.close()
  if (!Buffer.concat(parts).equals(sent)) {
    throw new Error(`${received} of ${count} bytes came back, or other ones`)
  }
  return { seconds }
}

const commands = {
  echo: (node, { address, bytes }) => echo(node, address, bytes),
  ping: async (node, { address }) => ({ seconds: await node.services.ping.ping(multiaddr(address)) / 1000 }),
  identify: async (node, { address }) => {
    const result = await node.services.identify.identify(await node.dial(multiaddr(address)))
    return {
      peer: result.peerId.toString(),
      addresses: result.listenAddrs.map(String),
      observed: result.observedAddr?.toString() ?? null,
      protocols: result.protocols,
      agent: result.agentVersion,
      version: result.protocolVersion
    }
  },
  dial: async (node, { address }) => { await node.dial(multiaddr(address)); return {} },
  provide: async (node, { multihash }) => {
    await node.contentRouting.provide(cid(multihash), timed())
    return {}
  },
  providers: async (node, { multihash }) => {
    const peers = []
    for await (const provider of node.contentRouting.findProviders(cid(multihash), timed())) {
      peers.push(provider.id.toString())
    }
    return { peers }
  },
  find: async (node, { peer }) => {
    const { multiaddrs } = await node.peerRouting.findPeer(peerIdFromString(peer), { ...timed(), useCache: false })
    return { addresses: multiaddrs.map(String) }
  },
  addresses: async (node) => ({ addresses: node.getMultiaddrs().map(String) }),
  // Those that others have dialled it at; the router is not asked.
  verified: async (node) => ({
    addresses: node.components.addressManager.getAddressesWithMetadata()
      .filter(({ multiaddr, verified }) => verified && !PRIVATE.test(multiaddr.toString()))
      .map(({ multiaddr }) => multiaddr.toString())
  })
}

function cid (multihash) {
  return CID.createV1(RAW, Digest.decode(Buffer.from(multihash, 'hex')))
}

function timed () {
  return { signal: AbortSignal.timeout(QUERY_MS) }
}

function say (line) {
  process.stdout.write(JSON.stringify(line) + '\n')
}

const kademlia = { clientMode: false, protocol: KAD, peerInfoMapper: passthroughMapper, initialQuerySelfInterval: 50 }
const roles = {
  serve: () => ({ relay: circuitRelayServer({ reservations: { applyDefaultLimit: false } }) }),
  kad: () => ({ kad: kadDHT(kademlia) }),
  autonat: () => ({ autonat: autoNATv2() })
}
const { listen, make } = TRANSPORTS[transport]
const isOutside = role === 'autonat' || punching !== undefined
const node = await createLibp2p({
  addresses: { listen: [isOutside ? listen.replace('127.0.0.1', '0.0.0.0') : listen, ...through] },
  transports: [make(), ...(relaying ? [circuitRelayTransport()] : [])],
  connectionEncrypters: [security === 'tls' ? tls() : noise()],
  streamMuxers: [yamux()],
  services: {
    identify: identify(),
    ping: ping(ANY_CONNECTION),
    ...roles[role]?.(),
    ...(punching === undefined ? {} : { dcutr: dcutr() })
  }
})
await node.handle(ECHO, (stream) => {
  answer(stream).catch((error) => stream.abort(error))
}, ANY_CONNECTION)
say({ peer: node.peerId.toString(), addresses: node.getMultiaddrs().map(String) })

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  try {
    say({ id: command.id, result: await commands[command.do](node, command) })
  } catch (error) {
    say({ id: command.id, error: `${error.name}: ${error.message}` })
  }
}
process.exit(0)
